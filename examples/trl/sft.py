"""Supervised fine-tuning with TRL: python examples/trl/sft.py --output_dir my-model

TRL's own collator; `assistant_only_loss` uses the chat template's generation blocks, so that prompt and image tokens
are not trained on. A mixture of experts gets TRL's router loss (the mean over the layers) and not the original's (the
sum).
"""

from emoji_rows import answer, load_rows, question
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from minimind_v import EMBEDDED_MODEL  # the import also lets the Auto classes know the model
from minimind_v.training import freeze

parser = HfArgumentParser(SFTConfig)
parser.set_defaults(output_dir="minimind-v-sft", learning_rate=1e-3, num_train_epochs=5, logging_steps=1)
parser.set_defaults(assistant_only_loss=True, max_length=None, bf16=False)
(arguments,) = parser.parse_args_into_dataclasses()

model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_MODEL, dtype="float32")
freeze(model, "sft")
trainer = SFTTrainer(
    model,
    arguments,
    train_dataset=load_rows(lambda name: {"messages": [question(), answer(f"This is a picture of: {name}.")]}),
    processing_class=AutoProcessor.from_pretrained(EMBEDDED_MODEL),
)
trainer.train()
trainer.save_model()
