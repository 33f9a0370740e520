"""Trains the bundled backbone `flux-scenes` and the judge that scores it. No stage of a run imports this."""
