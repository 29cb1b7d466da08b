"""On-policy preference data: prompts -> responses of the policy -> rewards -> pairs. Thin scripts, and what they share."""
