package stack

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"platter/provision"
)

// checkLimit bounds one question for health.
const checkLimit = 10 * time.Second

// prober asks components for their health, and speaks to what the site's
// certificates guard.
type prober struct {
	view   provision.View
	client *http.Client
}

func newProber(plan provision.Plan, sec provision.StackSecrets) (*prober, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(sec.CA)) {
		return nil, errors.New("the site's CA is not a certificate in PEM form: reinstall the node")
	}
	pair, err := tls.X509KeyPair([]byte(sec.Cert), []byte(sec.Key))
	if err != nil {
		return nil, fmt.Errorf("the node's certificate: %w: reinstall the node", err)
	}
	return &prober{view: provision.ViewOf(plan, sec), client: &http.Client{
		Transport: &http.Transport{
			Proxy:             nil,
			TLSClientConfig:   &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
			DialContext:       (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
			DisableKeepAlives: true,
		},
	}}, nil
}

// check asks whether the component serves on this node. One that names no way
// of asking is taken at systemd's word.
func (p *prober) check(ctx context.Context, c provision.PlacedComponent) error {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	switch {
	case c.Health.TCP != "":
		addr, err := p.view.Render("health", c.Health.TCP)
		if err != nil {
			return err
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		return conn.Close()
	case c.Health.URL != "":
		url, err := p.view.Render("health", c.Health.URL)
		if err != nil {
			return err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := p.client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
		if resp.StatusCode/100 != 2 {
			return fmt.Errorf("%s answers %s: %s", url, resp.Status, body)
		}
	}
	return nil
}
