"""Which experts of a model one's own data goes to, counted, for `kt_gpu_experts`."""

from ktmoe.calibration.counting import calibrate, in_words, of_data


__all__ = ["calibrate", "in_words", "of_data"]
