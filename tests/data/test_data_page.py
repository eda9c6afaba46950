"""docs/data.md: every schema, column, name of a role, kind of file and option of the data is on the page."""

import dataclasses
from pathlib import Path

from qlora_jax.data.files import EXTENSIONS
from qlora_jax.data.messages import CONTENT_KEYS, LEARNED_KEYS, ROLE_KEYS, ROLES
from qlora_jax.data.pairs import PREFERENCE_COLUMNS
from qlora_jax.data.schemas import SCHEMAS
from qlora_jax.finetune.options.data import DataOptions

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_everything_is_on_the_page() -> None:
    names = [*EXTENSIONS, *ROLE_KEYS, *CONTENT_KEYS, *LEARNED_KEYS, *PREFERENCE_COLUMNS]
    names += [name for names in ROLES.values() for name in names]
    names += [column for schema in SCHEMAS.values() for column in (*schema.columns, *schema.optional)]
    names += [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(DataOptions)]
    assert [name for name in names if f"`{name}" not in PAGE and f'"{name}"' not in PAGE] == []
