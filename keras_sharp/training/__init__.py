"""One step of training: what `SharpnessAwareModel` does where Keras takes its `train_step`.

| file | subject |
|---|---|
| `step.py` | the step: ask the method, write the outcome, report |
| `loss.py` | the training loss as a pure function of weights, state and data |
| `logs.py` | the extra logs |
| `checks.py` | what is refused before the first step |
"""
