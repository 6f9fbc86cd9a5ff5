"""Read activations at named sites: what each attention head of a block looks at."""

import numpy as np

import actgraph as ag

graph = ag.load("stories260k")
tapped = ag.run(graph, "tap{site=[blocks.2.attn.pattern, blocks.*.resid_post]}").graph

encoded = graph.companions.tokenizer.encode("Lily had a red ball. She")
ids = np.array([encoded.ids])
outputs = tapped.run({"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]})

for head, row in enumerate(outputs["blocks.2.attn.pattern"][0, :, -1]):
    place = int(np.argmax(row))
    print(f"head {head} of the last token looks at {encoded.tokens[place]!r} ({row[place]:.0%})")
for block in range(5):
    print(f"norm after block {block}: {np.linalg.norm(outputs[f'blocks.{block}.resid_post'][0, -1]):.2f}")
