"""What the command line draws: tables, coloured tokens, the progress of a run. Everything goes through one console."""
