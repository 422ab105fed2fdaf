"""Which of a teacher's derivatives help a student with few examples: `python -m experiments distill`."""
