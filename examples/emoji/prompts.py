"""The wording of the emoji task: questions, answers, and the chat template, shared by all steps."""

import random

# The first of each language are the pipeline's default and the original's own.
QUESTIONS = {
    "english": [
        "Describe this image.",
        "What is this?",
        "What is it?",
        "What's this?",
        "What's that?",
        "What is that?",
        "What is shown here?",
        "What is in the picture?",
        "What is in this image?",
        "What do you see?",
        "What can you see in this picture?",
        "What do you see in this photo?",
        "What does this picture show?",
        "What does the image show?",
        "What is the picture about?",
        "What thing is this?",
        "What is drawn here?",
        "What kind of thing is it?",
        "What object is in this image?",
        "Which object is this?",
        "What am I looking at?",
        "What would you call this?",
        "Describe the image.",
        "Describe this picture.",
        "Describe the picture in one sentence.",
        "Describe it.",
        "Describe what you see.",
        "Caption this image.",
        "Write a caption for this image.",
        "Give a short description.",
        "Provide a brief description of the given image.",
        "Give this picture a title.",
        "Name this.",
        "Name the thing in the picture.",
        "Identify the object.",
        "Tell me what this is.",
        "Tell me about this image.",
        "Please describe this image.",
        "Please tell me what is in the picture.",
        "Can you tell me what is in this picture?",
        "Could you describe this image for me?",
        "Do you know what this is?",
        "Look at this. What is it?",
        "Explain the content of the image.",
        "Answer in English: what is this?",
        "What is the name of this?",
    ],
    "chinese": [
        "描述一下这个图像的内容。",
        "这是什么？",
        "这是啥？",
        "那是什么？",
        "这是什么东西？",
        "这是什么呀？",
        "这个是什么？",
        "它是什么？",
        "这叫什么？",
        "这个东西叫什么名字？",
        "图片里有什么？",
        "这张图片里有什么？",
        "这张图里有什么东西？",
        "图中有什么？",
        "图里画的是什么？",
        "这个图里画的是什么呀？",
        "图像里是什么？",
        "照片里是什么？",
        "画面上是什么？",
        "这幅画画的是什么？",
        "你看到了什么？",
        "你看见了什么？",
        "你在图片里看到了什么？",
        "你能告诉我图片上的内容吗？",
        "你知道这是什么吗？",
        "这张图片显示了什么？",
        "这个图像展示了什么？",
        "这张图片的内容是什么？",
        "描述一下这张图片。",
        "描述这张图片。",
        "描述这个图像。",
        "描述图片内容。",
        "请描述这张图片。",
        "请描述一下这个图像。",
        "请用一句话介绍图片。",
        "简单描述一下这张图。",
        "请简要介绍这幅图像。",
        "看图说话",
        "请告诉我这是什么。",
        "请说出图中物体的名称。",
        "识别图中的物体。",
        "给这张图片写一个标题。",
        "给图片配一句说明。",
        "用中文说说图片里的东西。",
        "请用中文回答：这是什么？",
        "帮我看看这是什么。",
    ],
}


def vary(question: str, lot: random.Random) -> str:
    """As people type: sometimes in one case, without final mark, with a line break before or a blank after."""
    if lot.random() < 0.35:
        question = question.lower() if lot.random() < 0.8 else question.upper()
    if lot.random() < 0.3:
        question = question.rstrip(".?。？")
    elif lot.random() < 0.1:
        question = question[:-1] + lot.choice(["!", "?", ".", "？", "。", "?!"])
    return lot.choice(["", "", "", "\n"]) + question + lot.choice(["", "", "", " ", "\n"])


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
