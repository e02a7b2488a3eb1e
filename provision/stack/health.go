package stack

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
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

// control is patroni's REST API on this node.
func (p *prober) control(path string) string {
	return "https://" + p.view.Address.String() + ":8008/" + path
}

// primary tells whether this node's database takes writes.
func (p *prober) primary(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.control("primary"), nil)
	if err != nil {
		return false
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// switchover has another node's database take the writes (patroni's REST API,
// POST /switchover); this node's takes them now.
func (p *prober) switchover(ctx context.Context) error {
	secret, err := p.view.Secret("postgresql-control")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	body, err := json.Marshal(map[string]string{"leader": p.view.Node})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.control("switchover"), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.SetBasicAuth("platter", secret)
	req.Header.Set("Content-Type", "application/json")
	resp, err := p.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return refused("patroni", resp)
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
		return refused(url, resp)
	}
	return nil
}

// refused is what who says where it does not say yes, in one line: pages for
// people say no more than their status.
func refused(who string, resp *http.Response) error {
	if resp.StatusCode/100 == 2 {
		return nil
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
	text := strings.Join(strings.Fields(string(body)), " ")
	if text == "" || strings.HasPrefix(text, "<") {
		return fmt.Errorf("%s answers %s", who, resp.Status)
	}
	return fmt.Errorf("%s answers %s: %s", who, resp.Status, text)
}
