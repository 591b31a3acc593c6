"""docs/schema.md shows what the revisions make, whatever is in its names and comments, and what each one changed."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support.database import Database
from tests.support.programs import Result
from tests.support.project import Project, copy_parts
from tests.support.revisions import BLOCK, BUILD
from tools.paths import BIN

COMMENT = "- a list | <b>bold</b> `code` %% $x$ _em_ *em* \\| &amp;\n# head\n\n<!-- x --> [001] snake_case"
ODD = f"""
CREATE SCHEMA audit;
CREATE TYPE mood AS ENUM ('sad', 'a|b');
CREATE TABLE "Odd ""name"" größe" (
    pk bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "größe" numeric(10,2) DEFAULT 1.5, "2x" text[], m mood,
    "a b" varchar(50) NOT NULL DEFAULT 'x | y' UNIQUE, "a|b" timestamptz(3), "back`tick" text COLLATE "C",
    twice bigint GENERATED ALWAYS AS (pk * 2) STORED, parent bigint REFERENCES "Odd ""name"" größe",
    CONSTRAINT "a ` b" CHECK ("back`tick" ~ '^a\\|b$')
);
COMMENT ON TABLE "Odd ""name"" größe" IS '{COMMENT}';
COMMENT ON COLUMN "Odd ""name"" größe"."a|b" IS '{COMMENT}';
CREATE TABLE "Odd__name__größe" (x int);
CREATE TABLE audit.entry (
    a int, b int, c int, d bigint NOT NULL REFERENCES "Odd ""name"" größe", PRIMARY KEY (a, b),
    FOREIGN KEY (a, c) REFERENCES audit.entry (a, b)
);
CREATE UNIQUE INDEX entry_c ON audit.entry (abs(c)) WHERE d > 0;
CREATE TABLE audit.one (a int, b int, PRIMARY KEY (a, b), FOREIGN KEY (a, b) REFERENCES audit.entry);
CREATE TABLE event (at timestamptz NOT NULL DEFAULT '2020-01-01') PARTITION BY RANGE (at);
CREATE TABLE event_2020 PARTITION OF event FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE VIEW seen AS SELECT pk, 'a```b' AS t FROM "Odd ""name"" größe";
COMMENT ON COLUMN seen.t IS 'a column';
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NEW; END$$;
CREATE TRIGGER touched BEFORE UPDATE ON event FOR EACH ROW EXECUTE FUNCTION touch();
"""

# What Mermaid's versions 10.9 to 11.17 accept, or a part of it.
ENTITY = r'"[^"%\\\s]+"'
DIAGRAM = re.compile(rf"""erDiagram
(    {ENTITY} {{
(        [A-Za-z_][\w()\[\]]* [A-Za-z_]\w*( [PFU]K(, [PFU]K)*)?( "[\w .-]+")?
)*    }}
)+(    {ENTITY} (\|\||\|o)--o[|{{] {ENTITY} : "[A-Za-z_]\w*(, [A-Za-z_]\w*)*"
)*""")
GRAPH = re.compile(r"""flowchart TD
(    r\d+(\["[\w .,#;-]+"\]|( -- "\d+ more")? --> r\d+)
)+""")


@pytest.fixture
def project(project: Project) -> Project:
    """With the tools."""
    copy_parts(project.folder, "tools")
    return project


def run(project: Project) -> Result:
    return project.start("-m", "tools.schema", program=BIN / "python").wait(verbatim=True)


class Page:
    """The page as a forge shows it."""

    def __init__(self, project: Project) -> None:
        result = run(project)
        assert result.returncode == 0, result.text
        tokens = MarkdownIt("commonmark").enable("table").parse(result.stdout)
        assert not [token.content for token in tokens if token.type == "html_block"]
        self.fences = [token.content for token in tokens if token.type == "fence"]
        self.sections: dict[str, list[str]] = {}  # by heading: the paragraphs, and the rows with | between their cells
        self.links: dict[str, str] = {}
        lines: list[str] = []
        for before, token in pairwise(tokens):
            if token.type == "inline":
                text = self._text(token)
                if before.type == "heading_open":
                    lines = self.sections[text] = []
                elif before.type == "paragraph_open":
                    lines.append(text)
                else:
                    lines[-1] += f"{text} | "
            elif token.type == "tr_open":
                lines.append("")

    def _text(self, inline: Token) -> str:
        texts = []
        for token in inline.children or []:
            if token.type == "link_open":
                self.links[inline.content] = str(token.attrs["href"])
            elif token.content == "<br>" or token.type == "softbreak":
                texts.append("\n")
            elif token.type != "link_close":
                assert token.type in ("text", "code_inline"), token
                texts.append(token.content)
        return "".join(texts)


def sql(*statements: str) -> str:
    return "\n".join(f"op.execute({statement!r})" for statement in statements)


def test_any_name_definition_and_comment_is_shown_as_it_is(project: Project) -> None:
    project.add("002", sql(ODD))
    page = Page(project)
    odd = page.sections['"Odd ""name"" größe"']
    assert odd[:2] == [COMMENT, "Created in 002."]
    for row in [
        "pk | bigint | no | GENERATED ALWAYS AS IDENTITY |  | 002 | ",
        "größe | numeric(10,2) | yes | 1.5 |  | 002 | ",
        "a b | character varying(50) | no | 'x | y'::character varying |  | 002 | ",
        f"a|b | timestamp(3) with time zone | yes |  | {COMMENT} | 002 | ",
        'back`tick | text COLLATE pg_catalog."C" | yes |  |  | 002 | ',
        "twice | bigint | yes | GENERATED ALWAYS AS ((pk * 2)) STORED |  | 002 | ",
        'constraint | "a ` b" | CHECK (("back`tick" ~ \'^a\\|b$\'::text)) |  | 002 | ',
    ]:
        assert row in odd
    assert "index | audit.entry_c | UNIQUE btree (abs(c)) WHERE (d > 0) |  | 002 | " in page.sections["audit.entry"]
    default = "'2020-01-01 00:00:00+00'::timestamp with time zone"
    trigger = "CREATE TRIGGER touched BEFORE UPDATE ON public.event FOR EACH ROW EXECUTE FUNCTION public.touch()"
    assert page.sections["event"] == [
        "Created in 002.",
        "PARTITION BY RANGE (at)",
        "Column | Type | Null | Default | Comment | Changed in | ",
        f"at | timestamp with time zone | no | {default} |  | 002 | ",
        "Kind | Name | Definition | Comment | Changed in | ",
        f"trigger | touched | {trigger} |  | 002 | ",
    ]
    partition = "PARTITION OF public.event FOR VALUES FROM ('2020-01-01 00:00:00+00') TO ('2021-01-01 00:00:00+00')"
    assert page.sections["event_2020"] == ["Created in 002.", partition]
    assert page.sections["Type mood"] == ["Created in 002.", "ENUM ('sad', 'a|b')"]
    assert page.sections["View seen"][-1] == "column | seen.t |  | a column | 002 | "
    assert {"Schema audit", "Function touch()"} <= page.sections.keys()
    assert any("'a```b'::text AS t" in fence for fence in page.fences)


def test_the_diagram_has_the_keys_and_is_valid(project: Project) -> None:
    project.add("002", sql(ODD))
    diagram = Page(project).fences[0]
    assert DIAGRAM.fullmatch(diagram)
    for line in [
        '    "audit.entry" {',
        "        integer a PK, FK",
        '    "Odd__name__größe" {',
        '        bigint _pk PK "pk"',
        '        numeric(10_2) gr__e "größe"',
        '        text[] _2x "2x"',
        '        varchar(50) a_b UK "a b"',
        '        timestamptz(3) a_b "a_b"',
        "        mood m",
        '    "Odd__name__größe_" {',
        '    "audit.entry" |o--o{ "audit.entry" : "a, c"',
        '    "audit.entry" ||--o| "audit.one" : "a, b"',
        '    "Odd__name__größe" ||--o{ "audit.entry" : "d"',
        '    "Odd__name__größe" |o--o{ "Odd__name__größe" : "parent"',
    ]:
        assert line in diagram.split("\n")
    assert "event_2020" not in diagram
    assert "alembic_version" not in diagram


def test_of_too_many_tables_the_diagram_has_only_the_keys(project: Project) -> None:
    """Mermaid draws at most 50,000 characters."""
    columns = ", ".join(f"a_long_name_of_a_column_{number} text" for number in range(10))
    project.add(
        "002", f"for number in range(200): op.execute(f'CREATE TABLE t{{number}} (id int PRIMARY KEY, {columns})')"
    )
    page = Page(project)
    diagram = page.fences[0]
    assert DIAGRAM.fullmatch(diagram)
    assert diagram.count("        integer id PK\n") == 201
    assert "a_long_name" not in diagram
    assert "a_long_name_of_a_column_9 | text | yes |  |  | 002 | " in page.sections["t199"]


def test_each_change_has_its_revision(project: Project, database: Database) -> None:
    project.add("002", sql("CREATE TABLE audit (revision text, a int, b int)", "CREATE TABLE gone (x int)"))
    project.add("003", sql("COMMENT ON COLUMN audit.a IS 'later'", "DROP TABLE gone"))
    project.add("004a", BLOCK + BUILD, down="003")
    project.add("004b", sql("ALTER TABLE audit ALTER b SET NOT NULL", "CREATE SEQUENCE s"), down="003")
    project.add("005", "pass", down=("004a", "004b"), name='both "#1" ways')  # type: ignore[arg-type]
    for number in range(6, 13):
        project.add(f"{number:03}", sql("CREATE SEQUENCE last") if number == 12 else "pass")
    page = Page(project)
    assert page.sections["audit"] == [
        "Created in 002. Last changed in 004a.",
        "Column | Type | Null | Default | Comment | Changed in | ",
        "revision | text | yes |  |  | 002 | ",
        "a | integer | yes |  | later | 003 | ",
        "b | integer | no |  |  | 004b | ",
        "Kind | Name | Definition | Comment | Changed in | ",
        "index | slow | btree (revision) |  | 004a | ",
    ]
    assert page.sections["hcm_report_metadata"][0] == "Created in 001."
    assert page.sections["Sequence last"][0] == "Created in 012."
    assert "gone" not in page.sections
    assert database.at == ["012"]

    graph = page.fences[-1]
    assert GRAPH.fullmatch(graph)
    node = {text: name for name, text in re.findall(r'(r\d+)\["(.*)"\]', graph)}
    assert list(node) == [
        "001 create_hcm_report_metadata", "002 add", "003 add", "004b add", "004a add",
        "005 both #34;#35;1#34; ways", "012 add",
    ]  # fmt: skip
    first, second, third, b, a, merge, last = node.values()
    edges = {tuple(line.split()) for line in graph.split("\n") if "-->" in line}
    linear = {(one, "-->", two) for one, two in ((first, second), (second, third), (third, a), (third, b))}
    merged = {(a, "-->", merge), (b, "-->", merge), (merge, "--", '"6', 'more"', "-->", last)}
    assert edges == linear | merged
    assert page.sections["Revisions"][1:4] == [
        "001 |  | create_hcm_report_metadata | ", "002 | 001 | add | ", "003 | 002 | add | "
    ]  # fmt: skip
    assert '005 | 004a, 004b | both "#1" ways | ' in page.sections["Revisions"]
    assert page.links["[012]"] == "../migrations/versions/20251202_143000_012_add.py"


def test_without_revisions_the_page_says_so(project: Project) -> None:
    project.versions.joinpath(project.files()[0]).unlink()
    page = Page(project)
    assert list(page.sections) == ["Schema", "Revisions"]
    assert page.sections["Revisions"] == ["None yet."]


def test_a_revision_that_fails_ends_it_with_the_runners_line(project: Project) -> None:
    project.add("002", sql("SELECT 1/0"))
    result = run(project)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("FAILED: revision 002 ")
