"""Reading structure off a graph: recognisers written once on the shared vocabulary, for both dialects."""
