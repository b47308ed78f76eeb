"""What a training takes, known before anything is loaded: memory of the host and of the device, and time."""

from ktmoe.budget.budget import Budget, make, of_model, remedy
from ktmoe.budget.dry_step import Batch, CannotCount
from ktmoe.budget.prediction import predict
from ktmoe.budget.show import as_json, sentence, show


__all__ = ["Batch", "Budget", "CannotCount", "as_json", "make", "of_model", "predict", "remedy", "sentence", "show"]
