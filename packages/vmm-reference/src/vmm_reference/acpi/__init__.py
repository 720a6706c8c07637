"""ACPI as the machine writes it: AML (ACPI 6.4, chapter 20) and the static tables (chapter 5)."""
