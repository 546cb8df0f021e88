"""dagman knows how a network attends, how a student learns from a noisy teacher, and what the encoder is for."""
