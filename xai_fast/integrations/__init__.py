"""Adapters to other packages of explanations: ``captum`` and ``quantus``. None of them is imported here."""
