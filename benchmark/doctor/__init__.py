"""Is a model backdoored, and which defense would clean it? For people with a checkpoint and some clean images."""
