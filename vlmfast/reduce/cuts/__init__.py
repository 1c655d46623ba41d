"""Visual tokens cut between two layers of the language model, while every layer keeps its own attention."""
