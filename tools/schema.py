"""Write basd/recipe.schema.json from the classes that check a recipe: after any change of a key, its type, default or meaning.

    python tools/schema.py
"""
import json

from basd.runs.recipe_files import SCHEMA_FILE
from basd.runs.recipes import recipe_schema

SCHEMA_FILE.write_text(json.dumps(recipe_schema(), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
