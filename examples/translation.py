# %% [markdown]
# # Translation with experts that take on language pairs
#
# A dense model and one whose feed-forward layers hold an expert for each language pair learn to translate software
# help from English into four languages, at equal FLOPs a token. It takes two to three minutes on two CPU cores; `make
# assets` brings the text. Everything here is also on the command line: `mixtura finetune translation --preset quick`.

# %%
import os
from pathlib import Path

import mixtura
from mixtura.config import preset_path

OUT = Path(os.environ.get("MIXTURA_EXAMPLE_OUT", "runs/translation-example"))
STEPS = int(os.environ.get("MIXTURA_EXAMPLE_STEPS", "200"))

# %% [markdown]
# ## Train and compare
#
# A recipe is a TOML file; here it is the quick preset. The comparison trains both arms on the same sentence pairs in
# the same order, translates the held-out sentences, and writes `report.html`.

# %%
results = mixtura.compare(
    preset_path("translation-quick"),
    out=OUT,
    overrides=[f"training.steps={STEPS}", f"training.eval_every={STEPS}"],
)
print(results.summary.verdict.headline)

# %% [markdown]
# ## Scores by language pair
#
# chrF of each arm beside that of copying the source, which is what a model must beat before it is called a
# translator.

# %%
for name, arm in results.arms.items():
    pairs = arm.runs[0].details.pairs
    scores = ", ".join(f"{pair} {found.chrf:.1f} (copy {found.copy_chrf:.1f})" for pair, found in pairs.items())
    print(f"{name}: {scores}")

# %% [markdown]
# ## Translate

# %%
from mixtura.tasks.translation.trained_model import translate

checkpoint = OUT / "arms" / "language_experts" / "seed0" / "checkpoint"
for language in ("de", "fr"):
    print(language, translate(checkpoint, "Insert Rows", source_language="en", target_language=language))

# %% [markdown]
# ## One language pair alone
#
# Experts that are named by the language pair can be taken out: the model of one pair is a dense model with the same
# outputs for that pair, and as many parameters as the dense arm.

# %%
from transformers import AutoModelForCausalLM

from mixtura.models.transition import extract_language_model

whole = AutoModelForCausalLM.from_pretrained(checkpoint)
german = extract_language_model(whole, whole.config.expert_names.index("en-de"))
print(f"all pairs: {whole.num_parameters():,} parameters; en-de alone: {german.num_parameters():,}")

# %% [markdown]
# ## What the experts learned
#
# The page shows which expert takes which language pair, which kinds of tokens, and sentences coloured by expert. Here
# the language names the expert, so every layer tells all there is to tell; diagnose the `token_choice` arm of the
# default recipe to see what a learned router does without being told.

# %%
diagnosis = mixtura.diagnose(checkpoint, out=OUT / "diagnosis")
print(diagnosis.headline)
print(f"Report: {OUT / 'report.html'}\nExperts: {OUT / 'diagnosis' / 'diagnosis.html'}")
