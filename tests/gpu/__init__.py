"""What only a GPU can show: ``make gpu`` runs it on one, within nine minutes, and writes a table."""
