package dischost

import (
	"strings"
	"unicode"

	"platter/provision"
	"platter/provision/client"
)

// Limits of what is kept of a node's facts.
const (
	maxFacts     = 256
	maxFactKey   = 64   // bytes
	maxFactValue = 1024 // bytes
)

// cleaner makes reports fit to be kept and shown: what nodes say ends in
// terminals, where control characters are commands.
type cleaner struct{ keys map[string]bool }

func newCleaner(st provision.State) cleaner {
	c := cleaner{map[string]bool{}}
	for k := range st.Facts {
		c.keys[k] = true
	}
	return c
}

func (c cleaner) report(r provision.Report) provision.Report {
	r.Log = text(r.Log, client.MaxLogLine)
	r.Phase = text(r.Phase, 64)
	if r.PhaseN < 0 || r.PhaseOf < r.PhaseN {
		r.PhaseN, r.PhaseOf = 0, 0
	}
	if r.Total < 0 || r.Done < 0 || r.Done > r.Total {
		r.Done, r.Total = 0, 0
	}
	if r.Failure != nil {
		f := c.failure(*r.Failure)
		r.Failure = &f
	}
	r.Order = c.news(r.Order)
	if len(r.Facts) > 0 {
		facts := make(map[string]string, len(r.Facts))
		for k, v := range r.Facts {
			k = text(k, maxFactKey)
			if k == "" || !c.keys[k] && len(c.keys) >= maxFacts {
				continue
			}
			c.keys[k] = true
			facts[k] = text(v, maxFactValue)
		}
		r.Facts = facts
	}
	return r
}

func (c cleaner) failure(f provision.Failure) provision.Failure {
	f.Code, f.Message, f.Next = text(f.Code, 64), text(f.Message, client.MaxLogLine), text(f.Next, client.MaxLogLine)
	return f
}

// text returns s as one line of printable characters and at most limit bytes.
func text(s string, limit int) string {
	const more = "…"
	s = strings.ToValidUTF8(s, "?") // not longer than s
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit-len(more)], "") + more
	}
	return strings.TrimSpace(strings.Map(func(c rune) rune {
		switch {
		case c == '\t' || c == '\n' || c == '\r':
			return ' '
		case unicode.IsPrint(c):
			return c
		}
		return '?' // not longer than c
	}, s))
}
