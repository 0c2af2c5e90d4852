"""Services that all other folders use: devices, meshes, processes, signals, files and locks."""
