"""What a run on many processes will take: memory, FLOPs, bytes moved, bubbles, time. Arithmetic on a configuration."""
