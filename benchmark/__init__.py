"""Who meets whom, under which rules, and what came out: the one home of settings, files, tables, pictures and tracking."""
