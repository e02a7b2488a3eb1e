package client

import "time"

// WithIdle shortens the limit on silence.
func WithIdle(d time.Duration) Option { return func(o *options) { o.idle = d } }

// Held tells how many reports and how many bytes of text r holds.
func (r *Reporter) Held() (reports, size int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.queue), r.size
}
