"""Services for every layer above: devices, processes, signals, files, locks. Imports no models."""
