"""`bitdistill plan`: what a recipe will do and cost, from config.json and the first rows alone. No torch."""
