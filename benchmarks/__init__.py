"""Speed, memory and quality beside PEFT."""
