"""An analysis to look at: tables and figures."""
