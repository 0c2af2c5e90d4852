"""What every layer above shares: chips, sharding, processes, files and locks. It does not import models."""
