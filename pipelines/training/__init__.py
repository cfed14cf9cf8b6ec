"""Where weights change: trainers, validation, fine-tuning."""
