"""A script for two ranks: a small run under FSDP2 on the CPU, whose parameters are really sharded over both.

accelerate knows FSDP on accelerators alone, so what the launcher's configuration would say is said here.

    torchrun --nproc_per_node 2 fsdp_run.py TESTS SHARDS TOKENIZER FOLDER [LARGEST_FILE] [NAME=VALUE ...]
"""

import os
import resource
import signal
import sys

sys.path.insert(0, sys.argv[1])
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block"}
os.environ |= {"FSDP_RESHARD_AFTER_FORWARD": "true"}

import yaml
from accelerate import DistributedType, PartialState

from llmkit.data.manifest import load_manifest
from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import exit_on_user_error
from llmkit.training.optimizers import ShardedMuon
from small_run import parts


@exit_on_user_error
def main():
    _, _, shards, tokenizer, folder, largest, *fields = sys.argv
    arguments = {name: yaml.safe_load(value) for name, value in (field.split("=") for field in fields)}
    data = load_manifest(shards), load_tokenizer(tokenizer)
    make, model, args = parts(data, folder, per_device_train_batch_size=4, **arguments)
    # private: a CPU's ranks are of a kind for which accelerate does not look at FSDP's settings.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    run = make(model, args)
    assert run.is_fsdp_enabled
    if int(largest):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest), resource.RLIM_INFINITY))
    run.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.optim == "muon":
        assert isinstance(run.optimizer.optimizer.muon, ShardedMuon)
    run.save_model()


main()
