"""Preference tuning with TRL: python examples/trl/dpo.py --output_dir my-model

Every row has an answer to prefer and one to avoid; here, a short name is preferred to a whole sentence.
"""

from emoji_rows import answer, load_rows, question
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from trl import DPOConfig, DPOTrainer

from minimind_v import EMBEDDED_MODEL  # the import also lets the Auto classes know the model
from minimind_v.training import freeze

parser = HfArgumentParser(DPOConfig)
parser.set_defaults(output_dir="minimind-v-dpo", learning_rate=1e-4, num_train_epochs=5, logging_steps=1)
parser.set_defaults(max_length=None, bf16=False)
(arguments,) = parser.parse_args_into_dataclasses()

model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_MODEL, dtype="float32")
freeze(model, "sft")
trainer = DPOTrainer(
    model,
    args=arguments,
    train_dataset=load_rows(
        lambda name: {
            "prompt": [question()],
            "chosen": [answer(f"{name}.")],
            "rejected": [answer(f"I believe that this is a picture of a {name}.")],
        }
    ),
    processing_class=AutoProcessor.from_pretrained(EMBEDDED_MODEL),
)
trainer.train()
trainer.save_model()
