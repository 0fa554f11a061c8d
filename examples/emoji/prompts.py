"""The wording of the emoji task: questions, answers, and the chat template, shared by prepare.py and train.py."""

QUESTIONS = {
    "english": [
        "Describe this image.",
        "What is this?",
        "What is in the picture?",
        "Describe the image.",
        "Describe this picture.",
        "Describe the picture.",
        "What is in this image?",
        "What is in the image?",
        "What do you see?",
        "What does this picture show?",
        "What does the image show?",
        "What can you see in this picture?",
        "What's this?",
        "What is shown here?",
        "Caption this image.",
        "Write a caption for this image.",
        "Name this.",
        "Tell me what this is.",
        "Please describe this image.",
        "Can you tell me what is in this picture?",
    ],
    "chinese": [
        "描述一下这个图像的内容。",
        "这是什么？",
        "图片里有什么？",
        "描述一下这张图片。",
        "描述这张图片。",
        "请描述这张图片。",
        "请描述一下这个图像。",
        "描述这个图像。",
        "这张图片里有什么？",
        "图中有什么？",
        "图像里是什么？",
        "你看到了什么？",
        "你看见了什么？",
        "这张图片显示了什么？",
        "这个图像展示了什么？",
        "请告诉我这是什么。",
        "给这张图片写一个标题。",
        "用中文说说图片里的东西。",
        "这是什么东西？",
        "画面上是什么？",
    ],
}

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endgeneration %}
{%- else %}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}
{{- '<|image_pad|>' }}
{%- elif part['type'] == 'text' %}
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def answers(kind: dict) -> dict[str, str]:
    """Return the caption of a kind in each language, for example `Red apple.` and `红苹果。`."""
    english = kind["english"][0].upper() + kind["english"][1:]
    return {"english": f"{english}.", "chinese": f"{kind['chinese']}。"}
