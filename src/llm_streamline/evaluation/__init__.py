"""What was lost: perplexity, tasks, stability, divergence, generation, speed, size, in one record."""
