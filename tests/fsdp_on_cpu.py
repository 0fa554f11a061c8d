"""The training command with FSDP on CPU, where accelerate offers only DDP. Run by test_distributed.py."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import HfArgumentParser

from minimind_v.training.train import TrainArguments, train

(arguments,) = HfArgumentParser(TrainArguments).parse_args_into_dataclasses(sys.argv[1:])
assert arguments.device.type == "cpu"  # asking sets up the processes
# accelerate turns FSDP on for several GPUs only; everything behind that question runs on CPU too.
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
trainer = train(arguments)
assert trainer.accelerator.is_fsdp2
trainer.accelerator.end_training()
