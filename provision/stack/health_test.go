package stack

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// Operators read one line, in logs and in tables.
func TestRefusedIsOneLine(t *testing.T) {
	for body, want := range map[string]string{
		"":                                    "haproxy answers 503 Service Unavailable",
		"<html><body>\n<h1>503</h1></body>\n": "haproxy answers 503 Service Unavailable",
		"{\"state\":\n  \"starting\"}\n":      `haproxy answers 503 Service Unavailable: {"state": "starting"}`,
	} {
		resp := &http.Response{StatusCode: 503, Status: "503 Service Unavailable", Body: io.NopCloser(strings.NewReader(body))}
		if err := refused("haproxy", resp); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", body, err, want)
		}
	}
	if err := refused("haproxy", &http.Response{StatusCode: 204}); err != nil {
		t.Error(err)
	}
}
