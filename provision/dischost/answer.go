package dischost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"

	"platter/provision/client"
)

// answer is a handler that returns what it has to say, as JSON, or an error. A
// nil value with a nil error has been said already, or is nothing.
type answer func(http.ResponseWriter, *http.Request) (any, error)

// loggerKey carries the Host's log to where an error is answered.
type loggerKey struct{}

func (h *Host) logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), loggerKey{}, h.Log)))
	})
}

func (f answer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v, err := f(w, r)
	if err == nil && v == nil {
		return
	}
	status := http.StatusOK
	if err != nil {
		e := &client.Error{}
		if !errors.As(err, &e) {
			// The sentence is for whoever asks; it names files of the disc
			// host, which is what helps and is no secret to nodes.
			e = &client.Error{Status: http.StatusInternalServerError, Code: client.CodeInternal,
				Message: "the disc host failed: " + err.Error(), Next: "See its log."}
			if log, ok := r.Context().Value(loggerKey{}).(*slog.Logger); ok && r.Context().Err() == nil {
				log.Error("request failed", "method", r.Method, "path", r.URL.Path, "err", err)
			}
		}
		v, status = e, e.Status
	}
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

func bad(format string, args ...any) error {
	return &client.Error{Status: http.StatusBadRequest, Code: client.CodeBadRequest, Message: fmt.Sprintf(format, args...)}
}

func notFound(_ http.ResponseWriter, r *http.Request) (any, error) {
	return nil, &client.Error{Status: http.StatusNotFound, Code: "not-found", Message: fmt.Sprintf("there is nothing at %s %.200s", r.Method, r.URL.Path)}
}
