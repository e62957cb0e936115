"""From settings to rows: the plan of stages, the stages, and where they run."""
