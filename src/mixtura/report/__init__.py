"""Everything that is made from results.json alone: statistics, verdict, tables, figures and pages."""
