"""Steer a language model towards bright stories and ship the result as one ONNX file.

Run it anywhere: python examples/steer_a_story.py (writes into the current folder)
"""

import actgraph as ag

BRIGHT = ["The little girl was so happy.", "They laughed and smiled.", "It was a lot of fun.", "Tom loved his new friend."]
GLOOMY = ["The little girl was so sad.", "They cried and were scared.", "It hurt a lot.", "Tom was angry at his friend."]
SITE = "blocks.1.resid_post"

graph = ag.load("stories260k")
ag.extract_vector(graph, BRIGHT, GLOOMY, site=SITE).save("bright.safetensors")

for scale in (0, 2, 4, 8):
    steered = ag.run(graph, f"steer{{vector=bright.safetensors site={SITE} scale={scale}}}").graph
    text = ag.generate(steered, "", max_new_tokens=40).text
    print(f"scale {scale}: {' '.join(text.split())}")

steered.save("steered.onnx")
again = ag.generate(ag.load("steered.onnx"), "", max_new_tokens=40).text
assert again == text, "onnxruntime tells the same story as torch"
