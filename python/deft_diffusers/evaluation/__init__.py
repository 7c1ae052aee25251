"""How like the subject pictures are, how well they follow their prompts, and what a model has forgotten."""
