package disk

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"platter/provision"
)

// Source is where the bytes of objects come from. Nothing it returns is
// trusted.
type Source interface {
	// Open returns the n bytes from off of the object; the reader may end
	// early. An error that is a *provision.Failure is final, any other is
	// worth another try.
	Open(ctx context.Context, object string, off, n int64) (io.ReadCloser, error)
}

// HTTPSource reads objects from the disc host.
type HTTPSource struct {
	Client *http.Client
	Base   string // http://10.0.0.1
}

// Open asks for one range (RFC 9110, 14.2).
func (s HTTPSource) Open(ctx context.Context, object string, off, n int64) (io.ReadCloser, error) {
	url := s.Base + "/objects/" + object
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fmt.Errorf("fetch object %s: %w", object, err)
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	res, err := s.Client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetch object %s: %w", object, err)
	}
	switch want := fmt.Sprintf("bytes %d-", off); {
	case res.StatusCode == http.StatusPartialContent && strings.HasPrefix(res.Header.Get("Content-Range"), want):
		return res.Body, nil
	case res.StatusCode == http.StatusOK && off == 0:
		return res.Body, nil
	}
	res.Body.Close()
	if res.StatusCode == http.StatusNotFound || res.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		return nil, &provision.Failure{Code: "object-missing",
			Message: fmt.Sprintf("the disc host does not have bytes %d to %d of object %s (%s)", off, off+n-1, object, res.Status),
			Next:    "Import the image into the disc host's store again, then start the machine again"}
	}
	return nil, fmt.Errorf("fetch object %s: the disc host answers %s to a range from %d", object, res.Status, off)
}
