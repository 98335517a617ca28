"""A sweep: many prompts with different settings over one base, trained as banks by any number of processes, and the best of them judged."""
