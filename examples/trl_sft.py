"""Supervised fine-tuning on conversations with TRL's SFTTrainer; the routed experts run on the CPU.

    python trl_sft.py --model Qwen/Qwen3-30B-A3B-Instruct-2507 --data my_chats.jsonl

A row is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, or TRL's other forms.
"""

import argparse

import datasets
import peft
import torch
import transformers
from trl import SFTConfig, SFTTrainer

import ktmoe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B-Instruct-2507", help="a folder, or a name on the hub")
    parser.add_argument("--data", help="a .jsonl file; without it, a data set of the hub")
    parser.add_argument("--out", default="saves/trl_sft")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()

    arguments = SFTConfig(
        given.out,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
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

    # With LoRA from here: `peft_config=` of the trainer would not see the routed experts.
    model = ktmoe.load_model(
        given.model,
        ktmoe.KTConfig(kt_backend="auto"),
        lora=peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )

    if given.data:
        data = datasets.load_dataset("json", data_files=given.data, split="train")
    else:
        data = datasets.load_dataset("trl-lib/Capybara", split="train")
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(given.model),
        callbacks=[ktmoe.TrainingLog()],
    )
    trainer.train()
    trainer.save_model()  # the adapter, as stock peft reads it


if __name__ == "__main__":
    main()
