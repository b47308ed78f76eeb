"""LoRA fine-tuning with transformers' own Trainer; the routed experts run on the CPU.

python trainer_sft.py --model Qwen/Qwen3-30B-A3B-Instruct-2507 --data my_texts.txt
torchrun --nproc_per_node 4 trainer_sft.py        # a GPU for each process, one copy of the experts for all
"""

import argparse

import datasets
import peft
import torch
import transformers

import ktmoe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B-Instruct-2507", help="a folder, or a name on the hub")
    parser.add_argument("--data", help="a text file, a sample on each line; without it, a data set of the hub")
    parser.add_argument("--out", default="saves/trainer_sft")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()

    # First of all: several processes have to know of each other before the model is loaded.
    arguments = transformers.TrainingArguments(
        given.out,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_steps=50,
        report_to="none",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
    )

    # Attention, router and shared experts as transformers loads them; the routed experts stay in host memory.
    model = ktmoe.load_model(
        given.model,
        ktmoe.KTConfig(kt_backend="auto"),
        lora=peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )

    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    if given.data:
        texts = datasets.load_dataset("text", data_files=given.data, split="train")
    else:
        texts = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train")
    texts = texts.filter(lambda row: row["text"].strip())
    rows = texts.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=1024), remove_columns=texts.column_names
    )

    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[ktmoe.TrainingLog()],
    )
    trainer.train()
    trainer.save_model()  # the adapter, as stock peft reads it


if __name__ == "__main__":
    main()
