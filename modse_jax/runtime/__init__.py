"""Services for every layer above: devices, processes, signals, files and locks. Imports no models."""
