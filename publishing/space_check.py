"""What a Space does when the Hub starts it: the app comes up, and answers about a picture.

[`verify_space`] runs this file in a fresh process: python space_check.py FOLDER RESULT.json
"""

import json
import sys
from pathlib import Path

folder, result = Path(sys.argv[1]), Path(sys.argv[2])
sys.path[0] = str(folder)  # where Python looks first when it runs FOLDER/app.py

import app  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402

import minimind_v  # noqa: E402

if not Path(str(minimind_v.__file__)).is_relative_to(folder):
    sys.exit(f"The app runs with another copy of the code, {minimind_v.__file__}")
_, url, _ = app.page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **app.LAUNCH)
picture = handle_file(str(folder / "minimind_v" / "examples" / "images" / "apple.png"))
answer, _ = Client(url, verbose=False).predict({"text": "What is this?", "files": [picture]}, api_name="/chat")
if not isinstance(answer, str):  # but a message about an error
    sys.exit(f"The app does not answer: {answer}")
result.write_text(json.dumps(answer), encoding="utf-8")
