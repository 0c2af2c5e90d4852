"""The axes of the study Slicing and Dicing: its notation, recipe and arms."""
