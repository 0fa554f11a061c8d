"""Pages to try models with one's own pictures: `app` on gradio, `browser` without a server that computes."""
