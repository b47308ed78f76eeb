"""Direct preference optimisation with TRL's DPOTrainer; the routed experts run on the CPU.

    python trl_dpo.py --model Qwen/Qwen3-30B-A3B-Instruct-2507 --data my_pairs.jsonl

A row is {"prompt": ..., "chosen": ..., "rejected": ...}, of texts or of messages. The model that preferences are
compared with is the same one with its adapter switched off: nothing is loaded twice.
"""

import argparse

import datasets
import peft
import torch
import transformers
import trl
import trl.import_utils as trl_utils

import ktmoe


# trl 0.24 reads (False, None), transformers 5's way to say that a package is not there, as that it is.
for name, found in list(vars(trl_utils).items()):
    if name.endswith("_available") and isinstance(found, tuple):
        setattr(trl_utils, name, found[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B-Instruct-2507", help="a folder, or a name on the hub")
    parser.add_argument("--data", help="a .jsonl file; without it, a data set of the hub")
    parser.add_argument("--out", default="saves/trl_dpo")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()

    arguments = trl.DPOConfig(
        given.out,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        learning_rate=5e-6,
        max_length=1024,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_steps=50,
        report_to="none",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
    )

    model = ktmoe.load_model(
        given.model,
        ktmoe.KTConfig(kt_backend="auto"),
        lora=peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.get_base_model().warnings_issued = {}  # trl 0.24 expects it of every model; transformers 5 has it no more

    if given.data:
        data = datasets.load_dataset("json", data_files=given.data, split="train")
    else:
        data = datasets.load_dataset("trl-lib/ultrafeedback_binarized", split="train")
    trainer = trl.DPOTrainer(
        model,
        args=arguments,
        train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(given.model),
        callbacks=[ktmoe.TrainingLog()],
    )
    trainer.train()
    trainer.save_model()  # the adapter, as stock peft reads it


if __name__ == "__main__":
    main()
