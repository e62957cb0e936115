"""Every exhibit, in the order of the page. A new one is a module with its template, and a line here."""

from __future__ import annotations

# ruff: noqa: I001 - an import line for each exhibit would be most of this file
from benchmark.report.exhibits import (
    adaptive, alpha, benign, budget, canary, controls, detectors, elsewhere, extractor, natural, performance, pruned, ranks, rate,
    replaced, reproduction, robust, scope, selection, seminal, significance, size, threshold, training, validity,
)  # fmt: skip
from benchmark.report.exhibits.evidence import Exhibit

__all__ = ["EXHIBITS"]

EXHIBITS: tuple[Exhibit, ...] = (
    Exhibit("reproduction", "Reproduction", "Do the defenses do here what their papers report?", "cifar10-cpu", reproduction),
    Exhibit("seminal", "Older and newer defenses",
            "Which defense beats fine-tuning on the same clean images, and which the untouched model?", "cifar10-cpu", seminal),
    Exhibit("ranks", "Ranks", "Which defenses differ over many attacks, by rank tests?", "cifar10-cpu", ranks),
    Exhibit("benign", "Benign accuracy", "Why do benign accuracies differ between tables, and what is the poisoning rate?", "quick",
            benign),
    Exhibit("robust-accuracy", "Robust accuracy", "What is robust accuracy?", "quick", robust),
    Exhibit("replaced", "Poison replaces", "Is the poisoned training set D' larger than the clean set D?", "quick", replaced),
    Exhibit("validity", "Attack validity", "Are the attacks as strong as in the literature?", "quick", validity),
    Exhibit("validity-cifar10", "Attack validity on CIFAR-10 images", "And on CIFAR-10 images?", "cifar10-small", validity),
    Exhibit("attacks", "Newer attacks", "What about newer attacks?", "attacks", validity),
    Exhibit("rate", "Poisoning rate", "From which poisoning rate on is an attack implanted, and do defenses depend on it?",
            "rate", rate),
    Exhibit("performance", "Accuracy kept", "Do defenses remove backdoors without compromising performance?", "quick-all",
            performance),
    Exhibit("performance-cifar10", "Accuracy kept on CIFAR-10 images", "And on CIFAR-10 images?", "cifar10-small", performance),
    Exhibit("selection", "Selection", "Why is a baseline weaker here than in its paper: how was its threshold chosen?", "selection",
            selection),
    Exhibit("canary", "Canaries", "Can a defender choose the setting without seeing the attack, by planting a backdoor of its own?",
            "quick-all", canary),
    Exhibit("threshold", "Threshold", "How much depends on the threshold, which may have been chosen by eye?", "threshold",
            threshold),
    Exhibit("alpha", "Alpha", "Does the exponent alpha matter, or is it the Lipschitz quotient (alpha = 1) in other words?",
            "alpha", alpha),
    Exhibit("scope", "Scope", "Were baselines limited to the head too, and how fast are they then?", "scope", scope),
    Exhibit("pruned", "Units pruned", "How many neurons were pruned, and which semi-supervised method was used?", "quick-all",
            pruned),
    Exhibit("budget", "Clean budget", "How many clean images does a defense need, and what are they worth without it?", "budget",
            budget),
    Exhibit("extractor", "Extractor", "A clean extractor is an extra tool: what comes from it, and what from the defense?",
            "extractor", extractor),
    Exhibit("controls", "Plain classifiers", "Does a nearest-mean classifier on the extractor make the head pointless?",
            "quick-all", controls),
    Exhibit("detectors", "Isolated sets", "Do defenses that split the training set find the poison?", "quick-all", detectors),
    Exhibit("adaptive", "Adaptive attackers", "What does an attacker do who knows the defense?", "adaptive", adaptive),
    Exhibit("natural", "Natural backdoors", "What do defenses do to a clean model, which has backdoors by nature?", "natural",
            natural),
    Exhibit("size", "Larger images", "What about larger images and more classes?", "size", size),
    Exhibit("recipe", "Recipe", "Is a short recipe a fair stand-in for the literature's hundred epochs?", "recipe-small", training),
    Exhibit("precision", "Precision", "Does the arithmetic that makes training fast change the results?", "precision-small",
            training),
    Exhibit("elsewhere", "A machine is a seed: what repeats elsewhere", "Does another kind of machine give the same results?",
            "quick", elsewhere),
    Exhibit("significance", "Significance", "Are differences significant?", "quick-all", significance),
)  # fmt: skip
